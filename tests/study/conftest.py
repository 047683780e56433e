from tests.recognize.conftest import zoo

__all__ = ["zoo"]
