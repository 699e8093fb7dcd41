"""How merged values become codes: to the nearest one, or so that what the adapter does is kept."""
