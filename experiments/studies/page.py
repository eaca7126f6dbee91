def write(folder, out):
    raise NotImplementedError
