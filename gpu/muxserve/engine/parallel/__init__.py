"""One model on the devices of a mesh: by KV heads and columns, the ranks in step through torch.distributed.

`shard` and `checkpoint` are numpy at most; `group`, `control` and `decoder` are for executors.
"""
