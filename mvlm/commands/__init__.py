"""Commands of `mvlm`, one file per command or group of commands: parse, call, print."""
