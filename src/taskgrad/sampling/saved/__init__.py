"""States of a sampler: their form and its checks, and whether a sampler can go on from one."""
