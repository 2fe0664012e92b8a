"""``sayo doctor``: is this installation, this machine, this cluster or this run folder as a run needs it?"""
