"""Pure camera geometry. Imports nothing of the package but ``idnerf.types`` and ``idnerf.errors``."""
