"""A YAML of stages that name each other's outputs, carried out as jobs.

recipe    the file: variables, a matrix, stages
jobs      stages times the values of the matrix: jobs, with what each needs
command   a job as the command line that carries it out
forecast  every job planned before the first is run: sizes, memory, time, problems
ledger    which jobs are done, known by what was asked and of which inputs
schedule  what is to be done, in which order; a job that fails stops those that need it, and no others
results   the table at the end
child     a job's process, which ends with the one that began it
"""
