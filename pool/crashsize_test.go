//go:build !race

package pool

// crashHistories is how many a short run of TestCrash does.
const crashHistories = 60

// TestCrashRepeats runs crashRepeats histories twice each. Not quite all repeat: who runs for 10 ms by the
// clock on the wall is put behind the others by the runtime, which nothing here prevents. On a machine with
// eight times the work it can do, one history in fifty differed for that.
const crashRepeats, crashRepeatsLeast = 8, 5

// scrubWaysStep is 1 if objects are hurt in every way, n in every n-th.
const scrubWaysStep = 1
