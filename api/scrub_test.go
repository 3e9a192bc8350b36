package api

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"strings"
	"testing"
	"time"

	"graindisk/internal/jobs"
	"graindisk/pool"
)

func (*fakeGateway) StartScrub(name string, r ScrubRequest) (jobs.Job, error) {
	if name != "main" {
		return jobs.Job{}, fmt.Errorf("pool %s: %w", name, ErrNoPool)
	}
	return jobs.Job{ID: "scrub-1", State: jobs.Done, Report: pool.ScrubReport{
		Objects: r.BytesPerSecond, Lost: []pool.DamagedRange{{Disk: "vm1", LBA: 7, Blocks: 2}},
	}}, nil
}

func TestScrubOverTheWire(t *testing.T) {
	c, _ := start(t)
	ctx := context.Background()
	j, err := c.StartScrub(ctx, "main", ScrubRequest{BytesPerSecond: 70_000})
	var r pool.ScrubReport
	if err == nil {
		err = json.Unmarshal(j.Report, &r)
	}
	if err != nil || r.Objects != 70_000 || len(r.Lost) != 1 || r.Lost[0] != (pool.DamagedRange{Disk: "vm1", LBA: 7, Blocks: 2}) {
		t.Errorf("%+v %v", r, err)
	}
	if _, err := c.StartScrub(ctx, "x", ScrubRequest{}); !errors.Is(err, ErrNoPool) {
		t.Errorf("a pool that is not there: %v", err)
	}
	for _, what := range []string{"scrub", "repair"} {
		for body, want := range map[string]int{
			`{"rate":1}`: http.StatusBadRequest, `{"bytes_per_second":-1}`: http.StatusBadRequest, `{"bytes_per_second":1}`: http.StatusBadRequest,
			`{"bytes_per_second":65535}`: http.StatusBadRequest, `{"bytes_per_second":65536}`: http.StatusAccepted, "": http.StatusAccepted, "{}": http.StatusAccepted,
		} {
			resp, err := c.http.Post("http://gateway/v1/pools/main/"+what, "application/json", strings.NewReader(body))
			if err != nil {
				t.Fatal(err)
			}
			resp.Body.Close()
			if resp.StatusCode != want {
				t.Errorf("%s %q: %s, want %d", what, body, resp.Status, want)
			}
		}
	}
}

// TestASilentGatewayIsGivenUp asks one that accepts and never answers, as a stopped process does.
func TestASilentGatewayIsGivenUp(t *testing.T) {
	socket := t.TempDir() + "/admin.sock"
	if _, err := NewClient(socket).Pools(t.Context()); !errors.Is(err, ErrNoGateway) || !strings.Contains(err.Error(), "gateway serve") {
		t.Errorf("without a socket: %v", err)
	}
	l, err := net.Listen("unix", socket) // the kernel accepts for it
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	c := NewClient(socket)
	c.patience = 50 * time.Millisecond
	for name, ask := range map[string]func(context.Context) error{
		"pools":   func(ctx context.Context) error { _, err := c.Pools(ctx); return err },
		"disks":   func(ctx context.Context) error { _, err := c.Disks(ctx); return err },
		"jobs":    func(ctx context.Context) error { _, err := c.Jobs(ctx); return err },
		"deleted": func(ctx context.Context) error { _, err := c.DeletedDisks(ctx); return err },
		"scrub":   func(ctx context.Context) error { _, err := c.StartScrub(ctx, "main", ScrubRequest{}); return err },
		"repair":  func(ctx context.Context) error { _, err := c.StartRepair(ctx, "main", RepairRequest{}); return err },
		"create":  func(ctx context.Context) error { _, err := c.CreateDisk(ctx, NewDisk{}); return err },
		"delete":  func(ctx context.Context) error { return c.DeleteDisk(ctx, "vm", DeleteDisk{}) },
	} {
		err := ask(t.Context())
		change := name == "create" || name == "delete"
		if err == nil || !strings.Contains(err.Error(), "does not answer on "+socket) || strings.Contains(err.Error(), "may still be done") != change {
			t.Errorf("%s: %v", name, err)
		}
	}
	ctx, stop := context.WithCancel(t.Context())
	stop()
	if _, err := c.Pools(ctx); !errors.Is(err, context.Canceled) || strings.Contains(err.Error(), "answer") {
		t.Errorf("interrupted: %v", err)
	}
	ctx, stop = context.WithTimeout(t.Context(), 200*time.Millisecond) // what may take long waits for its context
	defer stop()
	if _, err := c.ReleasePool(ctx, "main"); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("release: %v", err)
	}
}
