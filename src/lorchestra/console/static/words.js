// Every word of the page, in English and Chinese.

const words = {
  adapters: ["Adapters", "适配器"], traffic: ["Traffic", "流量"], playground: ["Playground", "试用"], usage: ["Usage", "用量"], history: ["History", "历史"],
  skip: ["Skip to content", "跳到正文"], sections: ["Sections", "栏目"], language: ["Language", "语言"], theme: ["Colours", "配色"],
  theme_auto: ["System", "跟随系统"], theme_light: ["Light", "浅色"], theme_dark: ["Dark", "深色"],
  logout: ["Log out", "退出登录"], operator: ["operator", "操作员"], viewer: ["viewer", "查看者"], user: ["user", "用户"],
  open_server: ["no login", "无需登录"], loading: ["Loading…", "加载中…"], retry: ["Try again", "重试"], failed: ["This could not be shown", "无法显示"],
  unreachable: ["The server does not answer. It may be restarting; the connection may be down.", "服务器没有响应。可能正在重启，或网络已断开。"],
  login_title: ["Log in to lorchestra", "登录 lorchestra"], login_text: ["With an API key of this server that has the role viewer or operator.", "使用本服务器的 API 密钥，角色须为查看者或操作员。"],
  login_key: ["API key", "API 密钥"], login_do: ["Log in", "登录"], login_over: ["The session is over. Log in again to go on.", "会话已结束，请重新登录。"],
  login_how: ["Keys are made at the server:", "在服务器上创建密钥："], login_wait: ["Too many tries. Wait {n} s.", "尝试过多，请等待 {n} 秒。"],
  login_wrong: ["This is no key of this server, or one that was revoked.", "密钥无效或已被撤销。"],
  no_registry: ["This server follows no registry", "此服务器没有连接注册表"], no_registry_text: ["Adapters, traffic and history come from one. Start the server with:", "适配器、流量和历史都来自注册表。请这样启动服务器："],
  search: ["Search", "搜索"], search_adapters: ["Name, tag, base or maker", "名称、标签、基座或作者"], search_alias: ["Name or alias", "名称或别名"],
  any: ["any", "不限"], tag: ["Tag", "标签"], alias: ["Alias", "别名"], state: ["State", "状态"], base: ["Base", "基座"], metric: ["Metric", "指标"], metric_hint: ["loss<=1.2", "loss<=1.2"],
  clear: ["Clear filters", "清除筛选"], name: ["Name", "名称"], production: ["Production", "生产版本"], other_aliases: ["Other aliases", "其他别名"], versions: ["Versions", "版本数"],
  version: ["Version", "版本"], newest: ["Newest", "最新"], changed: ["Changed", "更新于"], ready: ["ready", "可用"], revoked: ["revoked", "已撤销"], canary: ["canary", "金丝雀"],
  revoked_n: ["{n} revoked", "{n} 个已撤销"], page_of: ["{a}–{b} of {n}", "第 {a}–{b} 项，共 {n} 项"], previous: ["Previous", "上一页"], next_page: ["Next", "下一页"],
  none_adapters: ["No adapters yet", "还没有适配器"], none_adapters_text: ["Push the first version:", "推送第一个版本："], none_found: ["Nothing matches", "没有匹配项"], none_found_text: ["No entry fits these filters.", "没有符合筛选条件的条目。"],
  tags: ["Tags", "标签"], aliases: ["Aliases", "别名"], metrics: ["Metrics", "指标"], rank: ["Rank", "秩"], created: ["Created", "创建于"], by: ["By", "操作人"], note: ["Note", "备注"],
  compare: ["Compare", "比较"], compare_two: ["Compare the two selected", "比较所选两个版本"], select_two: ["Select two versions to compare", "选择两个版本进行比较"], select_version: ["Select {name} to compare", "选择 {name} 进行比较"],
  no_alias: ["no alias", "无别名"], 
  promote: ["Promote", "提升"], rollback: ["Roll back", "回滚"], revoke: ["Revoke", "撤销"], reinstate: ["Reinstate", "恢复"], start_canary: ["Start canary", "启动金丝雀"],
  step_now: ["Next step", "下一步"], change_hold: ["Change hold", "调整保持时间"], abort: ["Abort", "中止"], cancel: ["Cancel", "取消"], reason: ["Reason", "原因"],
  reason_hint: ["For the audit log, and for whoever is on call next.", "写入审计日志，供下一位值班者参考。"], reason_missing: ["Write a reason first.", "请先填写原因。"], done: ["Done: {what}", "已完成：{what}"],
  promote_title: ["Promote {version}", "提升 {version}"], promote_text: ["The alias leads to this version from now on. Every server that follows the registry changes within seconds; answers that have begun end as they began.", "别名即刻指向该版本。所有跟随注册表的服务器会在数秒内切换；已开始的回答照常结束。"],
  gates: ["Gates", "门槛"], gates_hint: ["One a line, as loss<=1.2 or not-worse:loss. Empty for none.", "每行一个，例如 loss<=1.2 或 not-worse:loss。留空则不检查。"], force: ["Although a gate refuses", "即使门槛未通过"], force_guard: ["Although a guard is broken", "即使护栏已触发"],
  rollback_title: ["Roll back {alias}", "回滚 {alias}"], rollback_text: ["Back to where it was before {version}, by the audit log. A running canary of it ends.", "按审计日志退回到 {version} 之前的版本。正在进行的金丝雀会结束。"], rollback_to: ["To", "目标版本"], rollback_hint: ["Empty for the one before, or as v3.", "留空为上一版本，或填 v3。"],
  revoke_title: ["Revoke {version}", "撤销 {version}"], revoke_text: ["It answers nobody from now on, and answers that it is giving are ended. Aliases that lead to it are refused until they are moved.", "该版本立即停止服务，正在进行的回答会被终止。指向它的别名在移动之前会被拒绝。"],
  reinstate_title: ["Reinstate {version}", "恢复 {version}"], reinstate_text: ["It may answer again.", "该版本可以重新提供服务。"],
  start_title: ["Canary of {alias}", "{alias} 的金丝雀"], start_text: ["The candidate answers a growing share of the users. Guards compare it with {version}; a worse one is taken back by itself.", "候选版本承接逐步增大的用户比例。护栏将其与 {version} 比较；变差会自动撤回。"],
  candidate: ["Candidate", "候选版本"], stable: ["Stable", "稳定版本"], steps: ["Steps, % of users", "步骤，用户百分比"], hold: ["Hold of each step", "每步保持时间"], hold_hint: ["As 90s, 10m, 1h30m or 2d.", "例如 90s、10m、1h30m、2d。"],
  guards: ["Guards", "护栏"], guard_hint: ["Empty leaves a guard out.", "留空则不启用该护栏。"], g_errors: ["Error rate, points higher", "错误率上升（百分点）"], g_latency: ["Latency, % longer", "延迟增加（%）"], g_score: ["Score, lower by", "评分下降"], g_limit: ["Error rate at most, %", "错误率上限（%）"],
  min_requests: ["Requests in each step", "每步最少请求数"], promote_end: ["Move the alias by itself at the end", "结束时自动移动别名"], start_do: ["Start", "启动"],
  step_title: ["Next step of {alias}", "{alias} 的下一步"], step_text: ["From {a} to {b} of the users now, whatever is left of the hold.", "立即从 {a} 的用户增加到 {b}，不再等待保持时间。"],
  hold_title: ["Hold of {alias}", "{alias} 的保持时间"], hold_text: ["This step and those after it last at least so long, each from its own beginning. A long hold pauses the canary.", "当前及之后每一步至少持续该时间（从该步开始计）。设得很长即为暂停。"],
  finish_title: ["Promote {version}", "提升 {version}"], finish_text: ["The alias {alias} leads to the candidate, and the canary ends.", "别名 {alias} 指向候选版本，金丝雀结束。"],
  abort_title: ["Abort the canary of {alias}", "中止 {alias} 的金丝雀"], abort_text: ["Everybody is answered by {version} again.", "所有用户重新由 {version} 服务。"],
  running: ["running", "进行中"], promoted: ["promoted", "已提升"], aborted: ["aborted", "已中止"], "rolled-back": ["taken back", "已撤回"], step_of: ["step {a} of {b}", "第 {a} 步，共 {b} 步"],
  canaries: ["Canaries", "金丝雀"], none_canaries: ["No canary is running", "没有正在进行的金丝雀"], none_canaries_text: ["Every alias sends all of its traffic to one version. Start a canary from the table below.", "每个别名的流量都由单一版本承接。可从下表启动金丝雀。"], ended: ["Ended canaries", "已结束的金丝雀"], none_aliases: ["No aliases yet", "还没有别名"], none_aliases_text: ["Promote a version, and it is served under its name.", "提升一个版本后，即以其名称提供服务。"],
  users: ["Users", "用户"], requests: ["Requests", "请求"], errors: ["Errors", "错误"], latency: ["Latency", "延迟"], score: ["Score", "评分"], guard: ["Guard", "护栏"], worse_by: ["Worse by", "变差"], interval: ["Interval", "区间"], allowed: ["Allowed", "允许"], verdict: ["Verdict", "判定"],
  holds: ["holds", "通过"], unsure: ["unsure", "未定"], broken: ["broken", "触发"], guard_errors: ["Errors", "错误"], guard_latency: ["Latency", "延迟"], guard_score: ["Score", "评分"], guard_limit: ["Limit", "上限"], always: ["The intervals hold at every look together: looking early costs nothing.", "区间在任意次查看下同时成立：随时查看都不会增加误判。"],
  what_next: ["Next", "接下来"], not_here: ["This server cannot load the candidate; it sends everybody to the stable version.", "本服务器无法加载候选版本，全部流量仍由稳定版本承接。"], points: ["{n} points", "{n} 个百分点"], started_by: ["started {when} by {who}", "{who} 于 {when} 启动"],
  share: ["Share", "比例"], since: ["Since", "起始"], live: ["Live, every 2 s", "实时，每 2 秒"], stopped: ["Not live: {why}", "未更新：{why}"],
  registry: ["Registry", "注册表"], generation: ["Generation", "代次"], seen: ["Seen", "最近同步"], seen_ago: ["{n} s ago", "{n} 秒前"], hidden: ["Not served: the server's own names", "未提供：与服务器自有名称相同"], failing: ["Cannot be served here", "此处无法加载"], down: ["The registry is away: {why}", "注册表不可用：{why}"], steps_before: ["Steps before", "之前的步骤"],
  lineage: ["Lineage", "谱系"], fusion: ["Fusion weights", "融合权重"], files: ["Files", "文件"], modules: ["Modules", "模块"], settings: ["Settings", "设置"], recipe: ["Recipe", "配方"], data: ["Data", "数据"], tools: ["Tools", "工具"],
  digest: ["Digest", "摘要"], made_by: ["Made by", "生成方式"], parameters: ["Parameters", "参数量"], size: ["Size", "大小"], manifest: ["Manifest", "清单"], path: ["Path", "路径"], scale: ["Scale", "缩放"], value: ["Value", "数值"], items: ["Items", "样本数"], split: ["Split", "划分"], better: ["Better", "方向"], lower: ["lower", "越低越好"], higher: ["higher", "越高越好"],
  stage: ["stage", "阶段训练"], foreign: ["foreign", "外部"], fusion_kind: ["fusion", "融合"], weights_of: ["Coefficients of its parents", "各父适配器的系数"], context_of: ["Context while it trained", "训练时的上下文"],
  none_metrics: ["Nothing was measured", "没有测量结果"], none_metrics_text: ["Metrics come with a push, from the sealed test of a run.", "指标随推送而来，出自一次运行的封存测试。"], none_lineage: ["It descends from nothing here", "没有谱系"], none_lineage_text: ["It has no parents and no context, and nothing was made from it.", "没有父适配器和上下文，也没有后代。"], none_fusion: ["Not a fusion", "不是融合结果"], none_fusion_text: ["This version was trained by itself.", "该版本由单独训练得到。"],
  none_data: ["No data is recorded", "没有记录数据"], none_tools: ["No tools are recorded", "没有记录工具"], none_settings: ["No settings are recorded", "没有记录设置"], none_history: ["Nothing has happened yet", "还没有记录"], none_history_text: ["Every push, promotion and rollback is written here.", "每次推送、提升和回滚都会记录在此。"], graph_part: ["The nearest {a} of {b}", "最近的 {a} 个，共 {b} 个"], graph_label: ["Lineage of {name}, {n} adapters", "{name} 的谱系，{n} 个适配器"], graph_key: ["solid: member of a fusion · dashed: context · dotted frame: not in this registry", "实线：融合成员 · 虚线：上下文 · 点框：不在此注册表"],
  before: ["Before", "之前"], after: ["After", "之后"], change: ["Change", "变化"], compare_title: ["Compare two versions", "比较两个版本"], compare_do: ["Compare", "比较"], compare_text: ["Settings, data, metrics and the distance of the weights.", "设置、数据、指标与权重距离。"], compare_pick: ["Which two?", "比较哪两个？"], compare_pick_text: ["Write two references, such as clinic@v1 and clinic@v2.", "填写两个引用，例如 clinic@v1 与 clinic@v2。"], compare_slow: ["Reading both adapters' weights…", "正在读取两个适配器的权重…"],
  same_weights: ["The weights are the same", "权重相同"], distance: ["Distance of the weights", "权重距离"], relative: ["‖Δ₁ − Δ₂‖ / ‖Δ₁‖", "‖Δ₁ − Δ₂‖ / ‖Δ₁‖"], cosine: ["Cosine", "余弦"], norms: ["Norms", "范数"], module: ["Module", "模块"], no_difference: ["No difference", "没有差异"], swap: ["Swap", "交换"],
  v_better: ["better", "更好"], v_worse: ["worse", "更差"], v_unclear: ["unclear", "不明确"], "v_other test": ["other test", "测试不同"], "v_one only": ["one only", "仅一方"], other_modules: ["{n} more modules", "另有 {n} 个模块"],
  tenants: ["Tenants", "租户"], tenant: ["Tenant", "租户"], model: ["Model", "模型"], refused: ["Refused", "拒绝"], tokens_in: ["Prompt tokens", "输入词元"], tokens_out: ["Generated tokens", "输出词元"], mean_time: ["Mean time", "平均耗时"], last: ["Last", "最近"], last_hour: ["Last hour", "最近一小时"], since_start: ["Since this server started, {when}", "自本服务器启动（{when}）以来"], none_usage: ["No requests yet", "还没有请求"], none_usage_text: ["Counts appear with the first request to /v1.", "收到第一个 /v1 请求后即显示。"], per_minute: ["Requests a minute, the last hour; {n} in all", "最近一小时每分钟请求数，共 {n} 个"], search_usage: ["Tenant or model", "租户或模型"],
  prompt: ["Prompt", "提示词"], system: ["System prompt", "系统提示词"], send: ["Send to both", "同时发送"], stop: ["Stop", "停止"], add_member: ["Add adapter", "添加适配器"], remove: ["Remove {name}", "移除 {name}"], weight: ["Weight of {name}", "{name} 的权重"], member: ["Adapter", "适配器"], target: ["Answer {side}", "回答 {side}"], base_alone: ["base alone", "仅基座"], kind_chat: ["Chat", "对话"], kind_completion: ["Completion", "补全"], kind: ["Kind", "方式"], max_tokens: ["Max tokens", "最多词元"], temperature: ["Temperature", "温度"], seed: ["Seed", "种子"], seed_hint: ["random", "随机"], none_answer: ["No answer yet", "还没有回答"], none_answer_text: ["Mix adapters above and send a prompt.", "在上方混合适配器并发送提示词。"], waiting: ["Waiting for the first token…", "等待首个词元…"], answered: ["answered by {who}", "由 {who} 回答"], gate_chose: ["{gate} chose for this prompt:", "{gate} 为此提示词选择："], gate_chose_none: ["{gate} chose no adapter: the base answers.", "{gate} 未选择适配器，由基座回答。"], nearest_prompts: ["Nearest training prompts", "最接近的训练提示词"], tokens_n: ["{n} tokens", "{n} 个词元"], rate: ["{n} tokens/s", "{n} 词元/秒"], stopped_by_you: ["stopped", "已停止"], ctrl_enter: ["Ctrl+Enter", "Ctrl+Enter"], write_prompt: ["Write a prompt first.", "请先写提示词。"], end_user: ["User", "用户"], end_user_hint: ["for canaries", "用于金丝雀"],
  when: ["When", "时间"], actor: ["Actor", "操作人"], action: ["Action", "操作"], subject: ["Subject", "对象"], moved: ["From → to", "变更"], details: ["Details", "详情"], older: ["Older entries", "更早的记录"], newest_first: ["Newest first", "最新在前"], 
  a_push: ["push", "推送"], a_alias: ["alias", "别名"], a_promote: ["promote", "提升"], a_rollback: ["rollback", "回滚"], a_unalias: ["unalias", "移除别名"], a_revoke: ["revoke", "撤销"], a_restore: ["reinstate", "恢复"], a_accept: ["accept", "接受"], a_derive: ["derive", "派生"], "a_canary-start": ["canary start", "金丝雀启动"], "a_canary-step": ["canary step", "金丝雀步进"], "a_canary-promote": ["canary promote", "金丝雀提升"], "a_canary-abort": ["canary abort", "金丝雀中止"], "a_canary-rollback": ["canary rollback", "金丝雀撤回"], a_gc: ["gc", "清理"], a_import: ["import", "导入"], "a_restore-backup": ["restore backup", "恢复备份"], a_access: ["access", "访问"],
  not_found: ["There is no such page", "没有此页面"], 
};

let chosen = "en";
try { chosen = localStorage.getItem("lorchestra-language") ?? document.documentElement.lang; } catch { chosen = document.documentElement.lang; }
if (chosen !== "zh") chosen = "en";
document.documentElement.lang = chosen === "zh" ? "zh-Hans" : "en";

export const language = () => chosen;

export function speak(name) {
  chosen = name;
  document.documentElement.lang = name === "zh" ? "zh-Hans" : "en";
  try { localStorage.setItem("lorchestra-language", name); } catch { /* for this visit then */ }
}

/** A word or sentence of the page; {names} are filled in. */
export function t(key, values = {}) {
  const pair = words[key];
  if (!pair) return key;
  return pair[chosen === "zh" ? 1 : 0].replace(/\{(\w+)\}/g, (_, name) => values[name] ?? "");
}
