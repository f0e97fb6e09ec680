"""The losses of training, as pure functions: of preferences, and of distances to what teachers say."""
