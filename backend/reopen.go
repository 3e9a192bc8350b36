package backend

import "context"

// Reopener is a Store whose place may be taken away and made anew under it, such as a directory.
type Reopener interface {
	// Reopen opens the place as it is now, as an empty one if that is what it is. It is asked for only by who
	// means to use an emptied place again: until then it must not be taken for an empty store. Calls under way may
	// fail. Safe for concurrent use.
	Reopen(ctx context.Context) error
}

// Reopen opens the place of s anew, where a store round which s may be wrapped knows how; else it does nothing.
func Reopen(ctx context.Context, s Store) error {
	if r, ok := Innermost(s).(Reopener); ok {
		return r.Reopen(ctx)
	}
	return nil
}
