"""Other libraries' interfaces on clipfast's engine: one module a library."""
