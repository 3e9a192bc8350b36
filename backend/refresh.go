package backend

import "context"

// Refresher is a Store that can get its credentials anew, from the file or the service that they come from.
type Refresher interface {
	// Refresh gets the credentials and uses them from then on; calls under way keep theirs. It reports whether a
	// call that was refused as Auth may now succeed: not if the credentials are those that it had. After an error it
	// goes on with those. Safe for concurrent use.
	Refresh(ctx context.Context) (changed bool, err error)
}
