from hypothesis import settings

# The first call of a test loads libraries, and the machines of a continuous run are shared.
settings.register_profile("fusion", deadline=None)
settings.load_profile("fusion")
