"""A page of pictures from one run folder; ``python -m refiner_ds.gallery`` writes it."""
