"""Work for other processes, done in this one."""

import queue
from typing import Any


class Inline:
    """In place of a context of processes: what a process would do happens at once, in this one."""

    SimpleQueue = queue.SimpleQueue

    def __init__(self, dies: bool = False) -> None:
        self.dies = dies

    def Process(self, target: Any, args: Any) -> "Inline":
        self.target, self.args = target, args
        return self

    def start(self) -> None:
        if not self.dies:
            self.target(*self.args)

    exitcode = 7

    def is_alive(self) -> bool:
        return False

    def terminate(self) -> None:
        """Nothing is left to end."""

    join = terminate
