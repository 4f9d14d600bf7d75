"""`cite`: the paragraph and the BibTeX of a folder, without torch."""

from __future__ import annotations

import subprocess
import sys

from factories import synthetic


def test_cite_prints_the_paragraph_and_the_entries(run, tmp_path):
    synthetic().save(tmp_path / "out")
    code, out, err = run("cite", tmp_path / "out")
    assert (code, err) == (0, "")
    paragraph, first, *_ = out.split("\n\n")
    assert paragraph.startswith("We measured vit_b_32 ")
    assert first.startswith("@software{collapse_probe,")


def test_cite_of_no_results_is_one_line(run, tmp_path):
    code, out, err = run("cite", tmp_path)
    assert (code, out) == (1, "")
    assert "is not a findings folder" in err
    assert len(err.splitlines()) == 1


def test_cite_needs_no_torch(tmp_path):
    synthetic().save(tmp_path / "out")
    code = (
        "import sys\nfrom collapse_probe.cli.main import main\ntry:\n"
        f"    main(['cite', {str(tmp_path / 'out')!r}])\nexcept SystemExit:\n    pass\n"
        "loaded = [name for name in ('torch', 'matplotlib') if name in sys.modules]\nsys.exit(str(loaded) if loaded else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "We measured" in done.stdout
