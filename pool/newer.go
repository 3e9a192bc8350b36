package pool

import (
	"context"
	"errors"
	"fmt"
	"time"

	"graindisk/grains/segment"
	"graindisk/pool/root"
	"graindisk/vdisk/densetree"
	"graindisk/writeback"
)

// newerLook bounds how long an open looks for a newer release's traces before it claims.
const newerLook = 5 * time.Second

// refuseNewer looks whether the checkpoint or the newest cut was written by a newer release, before anything is
// claimed or written for what this one could not read anyway. What it cannot read for another reason is met again by
// who needs it. (A root of a newer release has been refused by then. Newer runs or tables come with a newer manifest.)
func (p *Pool) refuseNewer(ctx context.Context, v root.Value) error {
	ctx, cancel := context.WithTimeout(ctx, newerLook)
	defer cancel()
	if len(v.Checkpoints) > 0 {
		ref := v.Checkpoints[0]
		manifest, err := p.getPart(ctx, ref.Epoch, ref.N, 0)
		if err == nil {
			_, err = decodeSnapshot(manifest)
		}
		if isNewer(err) {
			return fmt.Errorf("checkpoint of cut %d: %w; upgrade this gateway", ref.Cut, err)
		}
	}
	if n := len(v.Cuts); n > 0 {
		if _, _, err := segment.ReadCut(ctx, p.segmentStore, refInfo(v.Cuts[n-1])); isNewer(err) {
			return fmt.Errorf("cut %d: %w; upgrade this gateway", v.Cuts[n-1].Cut, err)
		}
	}
	return nil
}

// isNewer tells errors by which something was written by a newer release.
func isNewer(err error) bool {
	for _, e := range []error{root.ErrNewer, segment.ErrNewer, densetree.ErrNewer, writeback.ErrNewer} {
		if errors.Is(err, e) {
			return true
		}
	}
	return false
}
