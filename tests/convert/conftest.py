from tests.learn.conftest import one_thread

__all__ = ["one_thread"]  # a fixture for these tests too
