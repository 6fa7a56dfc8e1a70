"""The variables of a Ray cluster that begins on this machine, for whoever starts one; no Ray.

Nobody reads its logs on a terminal, or looks at a dashboard of it. But Ray's log monitor looks for
new files ten times a second, to print what we keep off the terminal, and its agent adds up what
every process uses each five seconds: together 2 % of a core at rest, and several times that among a
few hundred log files. Nor does anybody drain a local node, which Ray Train would have a process
watch for.
"""

QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_LOG_MONITOR_MANY_FILES_THRESHOLD": "0",
    "LOG_NAME_UPDATE_INTERVAL_S": "3600",
    "REPORTER_UPDATE_INTERVAL_MS": "60000",
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
}
"""Each of them holds unless the environment says otherwise."""
