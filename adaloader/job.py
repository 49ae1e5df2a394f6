def add_run_arguments(parser):
    pass


def run_job(args):
    return 0
