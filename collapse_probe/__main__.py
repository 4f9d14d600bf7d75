"""`python -m collapse_probe`: the same program as `collapse-probe`, so that torchrun can start it."""

from collapse_probe.cli.main import main

if __name__ == "__main__":
    main()
