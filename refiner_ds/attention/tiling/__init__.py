"""What the tiled backend is built from: tiles of query rows, operations on a tile, moments summed over tiles."""
