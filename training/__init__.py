"""Makes the bundled demo model: a small Stable Diffusion of cartoon portraits, and its three sitters."""
