"""The normative half of Diffusion Rosetta: what the model computes, in data and in plain NumPy."""
