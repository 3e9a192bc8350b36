package cli

import (
	"bufio"
	"bytes"
	"fmt"
	"net/http"
	"os"
	"slices"
	"strconv"
	"strings"
	"testing"

	"graindisk/backend/backendtest/servertest"
	"graindisk/frontend/nbd/nbdclient"
	"graindisk/test/harness"
)

// TestReadsAreCounted writes a disk, reads it from the tier, from RAM and, with a new tier, from the targets, trims
// it, and reads at the metrics endpoint and in the pool's status how that went.
func TestReadsAreCounted(t *testing.T) {
	p := newPlace(t)
	address := servertest.FreeAddress(t)
	p.configure(fmt.Sprintf("listen: {nbd: [%q], metrics: %q}", "unix://"+p.path("nbd.sock"), address))
	b, err := os.ReadFile(p.config)
	p.must(err)
	p.write("gateway.yaml", strings.Replace(string(b), "  main:\n", "  main:\n    max_dirty_age: 1s\n", 1))
	p.create()
	data := bytes.Repeat([]byte("graindisk"), (4<<20)/9+1)[:4<<20]
	const size = 64 << 10
	readAll := func(c *nbdclient.Client) {
		t.Helper()
		b := make([]byte, size)
		for off := int64(0); off < int64(len(data)); off += size {
			p.must(c.ReadAt(t.Context(), b, off))
			if !bytes.Equal(b, data[off:][:size]) {
				t.Fatalf("wrong bytes at %d", off)
			}
		}
	}
	dial := func() *nbdclient.Client {
		t.Helper()
		c, err := nbdclient.Dial(t.Context(), "nbd+unix:///vm?socket="+p.path("nbd.sock"), nbdclient.Options{})
		p.must(err)
		return c
	}
	name := func(metric string, label ...string) string { // labels come sorted
		all := append(label, `pool="main"`)
		slices.Sort(all)
		return "gateway_" + metric + "{" + strings.Join(all, ",") + "}"
	}

	g := harness.Serve(t, "--config", p.config)
	harness.Must(t, harness.Binary(t), "disk", "create", "vm", "8MiB", "--config", p.config)
	c := dial()
	p.must(c.WriteAt(t.Context(), data, 0, true))
	harness.WaitPublished(t, "vm", "--config", p.config)
	readAll(c)
	readAll(c)
	m := scrape(t, address)
	if ssd, ram := m[name("cache_hits_total", `queue="small"`)], m[name("cache_hits_total", `queue="ram"`)]; ssd < 64 || ram < 32 || ssd+ram < 128 {
		t.Errorf("after two reads of 64 extents: %v hits on the tier, %v in RAM", ssd, ram)
	}
	if n := m[name("cache_bytes", `in="ram"`)]; n < 1<<20 {
		t.Errorf("%v bytes in RAM of 4 MiB that were read twice", n)
	}
	p.must(c.Trim(t.Context(), 0, 1<<20, true))
	harness.WaitPublished(t, "vm", "--config", p.config)
	clear(data[:1<<20])
	if n := scrape(t, address)[name("cache_forgotten_total")]; n < 16 {
		t.Errorf("%v extents forgotten after 16 were trimmed", n)
	}
	p.must(c.Close())
	if code := g.Stop(); code != 0 {
		t.Fatalf("exit code %d", code)
	}

	p.must(os.RemoveAll(p.path("tier")))
	harness.Serve(t, "--config", p.config)
	c = dial()
	for range 4 {
		readAll(c)
	}
	p.must(c.Close())
	m = scrape(t, address)
	for metric, least := range map[string]float64{
		name("cache_misses_total"):                           1,
		name("cache_fills_total", `queue="small"`):           48,
		name("cache_written_bytes_total", `what="fetched"`):  3 << 20,
		name("cache_bytes", `in="ssd"`):                      3 << 20,
		name("readahead_hits_total"):                         48,
		name("cache_index_bytes"):                            10000,
		name("cache_index_max_bytes"):                        3 << 20,
		name("cache_share_bytes", `disk="vm"`):               3 << 20,
		name("fetch_extents_total"):                          48,
		name("fetch_rounds_total"):                           1,
		name("readahead_extents_total", `outcome="fetched"`): 1,
		name("readahead_extents_total", `outcome="used"`):    1,
	} {
		if v, ok := m[metric]; !ok || v < least {
			t.Errorf("%s is %v, want at least %v", metric, v, least)
		}
	}
	for _, metric := range []string{
		name("cache_hits_total", `queue="main"`), name("cache_evicted_slots_total", `queue="small"`),
		name("cache_ghost_hits_total"), name("fetch_joined_total"),
		name("hedges_total", `outcome="issued"`), name("hedges_total", `outcome="won"`),
		name("hedges_total", `outcome="denied"`),
		name("readahead_extents_total", `outcome="wasted"`),
		name("cache_share_target_ratio", `disk="vm"`),
	} {
		if _, ok := m[metric]; !ok {
			t.Errorf("there is no %s", metric)
		}
	}
	var s struct {
		Tier struct {
			Cache struct {
				HitRate  float64 `json:"hit_rate"`
				SSDBytes float64 `json:"ssd_bytes"`
				RAMBytes float64 `json:"ram_bytes"`
				RAMMax   float64 `json:"ram_max_bytes"`
				Index    float64 `json:"index_bytes"`
				IndexMax float64 `json:"index_max_bytes"`
			} `json:"cache"`
		} `json:"tier"`
	}
	harness.JSON(t, &s, "pool", "status", "main", "--config", p.config)
	if x := s.Tier.Cache; x.HitRate < 0.7 || x.HitRate > 1 || x.SSDBytes < 3<<20 || x.RAMBytes == 0 || x.RAMMax < x.RAMBytes ||
		x.Index == 0 || x.Index > x.IndexMax {
		t.Errorf("pool status: %+v", x)
	}
}

// scrape reads the metrics: values by name with labels.
func scrape(t *testing.T, address string) map[string]float64 {
	t.Helper()
	resp, err := http.Get("http://" + address + "/metrics")
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	all := map[string]float64{}
	for lines := bufio.NewScanner(resp.Body); lines.Scan(); {
		name, value, _ := strings.Cut(lines.Text(), "} ")
		if v, err := strconv.ParseFloat(value, 64); err == nil {
			all[name+"}"] = v
		}
	}
	return all
}
