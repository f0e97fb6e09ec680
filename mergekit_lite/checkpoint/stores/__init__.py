"""Weights that are read by range from where they lie: object stores, web servers, the hub; nothing of them is stored.

A folder there is stood in for by a folder on this machine (``mirror``): its small files in full, each weight file as a
sparse file of its size, with a description of what it stands for (``files``). Everything looks at the stand-in as at
any model's folder; where bytes of a weight file are read, they are fetched (``ranges``, ``read_ahead``).
"""
