"""The parts that ship: places, schedules and stand-ins, which policies and specs combine."""
