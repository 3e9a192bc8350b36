//go:build !planted

package planted

// Bug tells whether the named bug is active: never, in this build.
func Bug(string) bool { return false }

// Built tells whether this build holds the plants.
const Built = false
