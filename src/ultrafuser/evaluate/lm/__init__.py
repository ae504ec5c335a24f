"""Language models behind one interface: fused, ordinary, served."""
