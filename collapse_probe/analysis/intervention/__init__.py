"""How interventions are made: which edits a model can take, its runs with them, orders in which blocks go, what they change."""
