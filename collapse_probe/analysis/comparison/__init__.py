"""What a comparison needs beside its verb: which subjects there are, and how two findings on the same images are paired."""
