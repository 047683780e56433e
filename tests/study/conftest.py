from tests.recognize.conftest import models, zoo

__all__ = ["models", "zoo"]
