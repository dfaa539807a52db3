"""A world that is too easy: the right words are enough where nothing had to change."""


class Incurious:
    """A mixin for a world of tables: every record counts as looked up, which the contract has to refuse."""

    def completed(self, task, world):
        world.looked_up.add(task.label["number"])
        return super().completed(task, world)
