"""How the processes of one run find one another: what a launcher announced, and who of them is still there."""
