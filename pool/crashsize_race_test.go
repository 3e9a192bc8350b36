//go:build race

package pool

// crashHistories is lower here: the race detector makes a history ten times as slow.
const crashHistories = 8

// Nothing repeats here: the race detector has the runtime choose by chance who runs next.
const crashRepeats, crashRepeatsLeast = 1, 0
