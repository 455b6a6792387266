"""The paper's refiner: expansion, distributed local attention, reduction; linear in the map."""
