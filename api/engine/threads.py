"""Where tensors are computed on a CPU: on the step loop's thread, and on threads that end with their work.

PyTorch computes with libgomp there, which gives each thread that computes a team of its own. As soon as all teams
together have more threads than there are cores, they sleep between any two loops instead of spinning for a moment: on
two cores a step took 31 ms, and with a second team beside it, idle, 53 to 85 ms. A team ends with its thread.
"""

import contextvars
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

T = TypeVar("T")


def in_own_thread(action: Callable[[], T]) -> T:
    """Returns what `action` does on a thread that ends with it. Blocks."""
    done = Future[T]()
    context = contextvars.copy_context()
    thread = threading.Thread(target=context.run, args=(settle, done, action), name="load", daemon=True)
    thread.start()
    thread.join()
    try:
        return done.result()
    finally:
        del done  # an error's traceback has this frame, and would keep what it holds alive with it


def settle(done: "Future[T]", action: Callable[[], T]) -> None:
    """Gives `done` what `action` returns or raises."""
    try:
        done.set_result(action())
    except Exception as error:
        done.set_exception(error)
        del done
