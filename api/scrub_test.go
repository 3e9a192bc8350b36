package api

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"path/filepath"
	"strings"
	"testing"

	"graindisk/pool"
)

// scrubGateway waits for the end of the request if the rate is 13.
type scrubGateway struct {
	*fakeGateway
	steps chan string
}

func (g scrubGateway) Scrub(ctx context.Context, name string, r ScrubRequest) (pool.ScrubReport, error) {
	if name != "main" {
		return pool.ScrubReport{}, fmt.Errorf("pool %s: %w", name, ErrNoPool)
	}
	if r.BytesPerSecond == 13 {
		g.steps <- "begun"
		<-ctx.Done()
		g.steps <- "ended"
		return pool.ScrubReport{}, ctx.Err()
	}
	return pool.ScrubReport{Objects: r.BytesPerSecond, Lost: []pool.DamagedRange{{Disk: "vm1", LBA: 7, Blocks: 2}}}, nil
}

func TestScrubOverTheWire(t *testing.T) {
	socket := filepath.Join(t.TempDir(), "admin.sock")
	l, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	sctx, end := context.WithCancel(context.Background())
	g := scrubGateway{&fakeGateway{map[string]pool.DiskInfo{}}, make(chan string)}
	done := make(chan error)
	go func() { done <- Serve(sctx, l, Handler(g, nil), slog.New(slog.DiscardHandler)) }()
	c := NewClient(socket)
	r, err := c.Scrub(context.Background(), "main", ScrubRequest{BytesPerSecond: 5})
	if err != nil || r.Objects != 5 || len(r.Lost) != 1 || r.Lost[0] != (pool.DamagedRange{Disk: "vm1", LBA: 7, Blocks: 2}) {
		t.Errorf("%+v %v", r, err)
	}
	if _, err := c.Scrub(context.Background(), "x", ScrubRequest{}); !errors.Is(err, ErrNoPool) {
		t.Errorf("a pool that is not there: %v", err)
	}
	for body, want := range map[string]int{
		`{"rate":1}`: http.StatusBadRequest, `{"bytes_per_second":-1}`: http.StatusBadRequest, "": http.StatusOK, "{}": http.StatusOK,
	} {
		resp, err := c.http.Post("http://gateway/v1/pools/main/scrub", "application/json", strings.NewReader(body))
		if err != nil {
			t.Fatal(err)
		}
		resp.Body.Close()
		if resp.StatusCode != want {
			t.Errorf("%q: %s, want %d", body, resp.Status, want)
		}
	}
	ctx, stop := context.WithCancel(context.Background())
	ended := make(chan error)
	go func() {
		_, err := c.Scrub(ctx, "main", ScrubRequest{BytesPerSecond: 13})
		ended <- err
	}()
	<-g.steps
	stop()
	<-g.steps // at the server
	if err := <-ended; !errors.Is(err, context.Canceled) {
		t.Errorf("the client got %v", err)
	}
	end()
	if err := <-done; err != nil {
		t.Error(err)
	}
}
