"""Decoding in a process of its own, so that no file can take its reader down with it.

    wire       messages and arrays between the two processes
    process    starts the other one, asks it, and makes an input error of every end it may come to
    limits     what the other one may use: memory, processor time, files
    place      which file it is at, to be found there after its end
    worker     its main loop
    jobs       what it can be asked for

An `except` is not enough: a decoder can abort the interpreter, raise what no handler expects, take
all memory or never end. `cdt_runtime.reading` is the face of it.
"""
