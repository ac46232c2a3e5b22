class BundleError(RuntimeError):
    pass
