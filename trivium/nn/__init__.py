"""Floor 1: the parts that models are made of. One file per idea: its spec, its module, its registration.

Shapes, for the whole tree: B batch, T time, S slots of keys, H heads, K kv heads, G query heads per kv head,
D head dim, C model dim, V vocabulary, R rank, N selected rows.
"""
