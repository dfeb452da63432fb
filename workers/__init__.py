"""Everything of ours that a jail can see: the warden, the zygote, the call, and `atp_sdk`.

Runs inside the jail, before and beside hostile code; imports the standard library and msgpack only.
The jail loads this package under a private name, so modules refer to each other relatively, and the
trusted side imports nothing of it but `workers.frames`. Runs on CPython 3.9 and later.
"""
