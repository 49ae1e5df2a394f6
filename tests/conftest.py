"""Settings of all tests: machines that many share are slow at times, and no example has a deadline for it."""

from hypothesis import settings

settings.register_profile("without deadlines", deadline=None)
settings.load_profile("without deadlines")
