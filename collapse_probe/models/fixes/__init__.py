"""The remedies of the literature: one file each; each ends with its entry in `FIXES`."""
