"""Which parameters of a model are followed, and which are left out, and why."""
