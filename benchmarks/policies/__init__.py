"""What the default policy is worth: the same training run under several policies, in three settings.

    python -m benchmarks.policies --setting many --policy OverwriteBoost --seed 100
    python -m benchmarks.policies.tables

The first appends a JSON line per run to a file, the second makes the tables of docs/policy-log.md from it.

    python -m benchmarks.policies.contract
    python -m benchmarks.policies.contract_table

The contract of the default policy: many small random scenarios (``scenarios``) in a simulator of the tracker
(``simulator``), drawn by the package's own sampler (``simulate``). A family of scenarios is one function.
"""
