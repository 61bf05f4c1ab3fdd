"""Starting a stage's ranks on one node or several, watching them, and ending all of them when one fails.

``nemo-rmt`` runs once on each node, as ``srun --ntasks-per-node=1`` starts it: the first leads, the others follow. They
meet in the run folder, which so proves to be the same on every node. Standard library only.
"""
