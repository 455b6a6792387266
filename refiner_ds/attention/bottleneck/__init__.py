"""The released models' refiner: an inverted bottleneck with batch norms, an identity and one more norm."""
