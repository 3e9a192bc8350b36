//go:build !race

package pool

// crashHistories is how many a short run of TestCrash does.
const crashHistories = 60
