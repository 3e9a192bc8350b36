//go:build race

package pool

// crashHistories is lower here: the race detector makes a history ten times as slow.
const crashHistories = 8

// Nothing repeats here: the race detector has the runtime choose by chance who runs next.
const crashRepeats, crashRepeatsLeast = 1, 0

// scrubWaysStep is 1 if objects are hurt in every way, n in every n-th.
const scrubWaysStep = 5
