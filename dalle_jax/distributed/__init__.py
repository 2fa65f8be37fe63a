"""The processes of one job: how they find each other, agree, and end together when one of them dies or hangs.

A process that waits for another one inside a collective waits forever. So each publishes where it is (`Watchdog`);
whoever finds one that is gone or stuck names it, and all end with a status on which the launchers start the job again.
JAX's distributed runtime does the work: initialization (`jax.distributed`), collectives (gloo on CPUs) and the
key-value store in process 0. With one process nothing here costs or does anything.
"""

from dalle_jax.distributed.agree import gather_json, stop_agreed, whole, whole_in_first
from dalle_jax.distributed.cluster import add_arguments, initialize
from dalle_jax.distributed.watchdog import Watchdog

__all__ = ["Watchdog", "add_arguments", "gather_json", "initialize", "stop_agreed", "whole", "whole_in_first"]
